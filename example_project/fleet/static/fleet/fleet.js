// The live fleet: asks the site what changes every second, and writes it into the page that the server drew.
"use strict";

const PERIOD_MS = 1000;
const main = document.querySelector("main.fleet");
const live = document.getElementById("live");
const byId = (id) => document.getElementById(id);

function say(text, on) {
  live.textContent = text;
  live.className = on ? "live on" : "live off";
}

function showHost(name, host) {
  const tile = document.querySelector(`[data-host="${CSS.escape(name)}"]`);
  if (!tile) return;
  tile.dataset.state = host.state;
  tile.dataset.goal = host.goal;
  tile.toggleAttribute("data-trouble", host.trouble !== "");
  tile.title = host.label;
  tile.setAttribute("aria-label", host.label);
  tile.querySelector(".tile-state").textContent = host.state;
  tile.querySelector(".load i").style.width = `${host.load}%`;
}

function showRack(name, rack) {
  const section = document.querySelector(`[data-rack="${CSS.escape(name)}"]`);
  if (!section) return;
  section.querySelector("progress").value = rack.at_goal;
  section.querySelector(".rack-count").textContent = `${rack.at_goal} of ${rack.total} at goal`;
  for (const button of section.querySelectorAll("button")) {
    button.disabled = rack.goals.length === 1 && rack.goals[0] === button.value;
  }
}

function showEvents(events) {
  const template = byId("event-template");
  byId("events").replaceChildren(...events.map((event) => {
    const item = template.content.firstElementChild.cloneNode(true);
    const [time, link, text] = item.children;
    item.dataset.kind = event.kind;
    time.dateTime = event.at;
    time.textContent = event.at.slice(11, 19);
    link.href = `/hosts/${event.host}/`;
    link.textContent = event.host;
    text.textContent = event.text;
    return item;
  }));
}

async function refresh() {
  const response = await fetch(main.dataset.url, { signal: AbortSignal.timeout(10 * PERIOD_MS) });
  if (!response.ok) throw new Error(`status ${response.status}`);
  const fleet = await response.json();
  Object.entries(fleet.hosts).forEach(([name, host]) => showHost(name, host));
  Object.entries(fleet.racks).forEach(([name, rack]) => showRack(name, rack));
  for (const [state, count] of Object.entries(fleet.counts)) {
    document.querySelector(`[data-count="${state}"]`).textContent = count;
  }
  byId("at-goal").textContent = fleet.at_goal;
  byId("total").textContent = fleet.total;
  showEvents(fleet.events);
}

let timer = null;

async function tick() {
  clearTimeout(timer);
  if (document.hidden) return; // visibilitychange starts it again
  try {
    await refresh();
    say(`live, ${new Date().toISOString().slice(11, 19)} UTC`, true);
  } catch {
    say("the site does not answer; trying again", false);
  }
  clearTimeout(timer); // another tick may have started meanwhile
  timer = setTimeout(tick, PERIOD_MS);
}

// A button changes the goal without a new page; without JavaScript the form does it with one.
document.querySelector(".racks").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  try {
    const response = await fetch(form.action, { method: "POST", body: new FormData(form, event.submitter) });
    if (!response.ok) throw new Error(await response.text());
    tick();
  } catch (error) {
    alert(`The goal was not set: ${error.message}`);
  }
});

document.querySelector(".filter select").addEventListener("change", (event) => event.target.form.submit());
document.addEventListener("visibilitychange", tick);
tick();
