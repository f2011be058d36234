/* Every 5 seconds, while the page is visible, its live part becomes what Flower would show now. */
(function () {
    "use strict";

    const PERIOD = 5000;
    const clock = document.querySelector("[data-goalstate-clock]");

    function livePart(page) {
        return page.querySelector("[data-goalstate-live]");
    }

    // By what a link or a button is known again on the next page.
    function identity(element) {
        return element && [element.tagName, element.getAttribute("href"), element.value,
            element.form && element.form.action].join(" ");
    }

    function replace(old, fresh) {
        const focused = old.contains(document.activeElement) ? identity(document.activeElement) : null;
        const scrolled = Array.from(old.querySelectorAll("section"), (each) => each.scrollLeft);
        old.replaceWith(fresh);
        fresh.querySelectorAll("section").forEach((each, n) => { each.scrollLeft = scrolled[n] || 0; });
        if (focused) {
            const again = Array.from(fresh.querySelectorAll("a, button, summary, section"))
                .find((each) => identity(each) === focused);
            if (again) {
                again.focus({preventScroll: true});
            }
        }
    }

    function tell(text, isWell) {
        clock.hidden = false;
        clock.querySelector("[data-goalstate-clock-text]").textContent = text;
        clock.querySelector(".status-dot").className = "status-dot status-dot-" + (isWell ? "live" : "error");
    }

    // Nobody wants a page to change beneath an open question or a selected text.
    function isBusy(old) {
        const selection = document.getSelection();
        return document.hidden || old.querySelector("details[open]") ||
            (selection && !selection.isCollapsed && old.contains(selection.anchorNode));
    }

    async function refresh() {
        const old = livePart(document);
        if (!old) {
            return;
        }
        if (!isBusy(old)) {
            try {
                const answer = await fetch(location.href, {redirect: "manual"});
                const text = await answer.text();
                const fresh = livePart(new DOMParser().parseFromString(text, "text/html"));
                if (!fresh) {  // it is gone, or somebody has to log in again
                    location.reload();
                    return;
                }
                if (!isBusy(old)) {
                    replace(old, document.adoptNode(fresh));
                }
                tell("Updated " + new Date().toLocaleTimeString(), true);
            } catch (error) {
                tell("Flower does not answer", false);
            }
        }
        setTimeout(refresh, PERIOD);
    }

    // What was done is told once.
    const here = new URL(location.href);
    if (here.searchParams.has("done")) {
        here.searchParams.delete("done");
        history.replaceState(null, "", here);
    }
    if (livePart(document)) {
        tell("Live", true);
        setTimeout(refresh, PERIOD);
    }
}());
