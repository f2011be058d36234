"""The admin: its list, its form, its page of the engine."""

import re
from contextlib import contextmanager
from unittest import mock

from django.contrib.admin import ModelAdmin, site
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from orders.admin import OrderAdmin
from orders.models import Order, Status
from shop.celery import engine

from celery_goalstate.exceptions import IndexUnavailable

from .base import TransactionCase, described

LIST = "/admin/orders/order/"
OVERVIEW = "/admin/goalstate/overview/"


def user(*permissions):
    found = User.objects.create_user("somebody", is_staff=True)
    found.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    return found


@contextmanager
def index_calls():
    """The names of the methods of the index that are called."""
    called, index = [], engine.parts.index
    names = ("describe", "overviews", "kinds", "counts", "records", "paused", "enqueue")
    with mock.patch.multiple(index, **{name: _counted(called, name, getattr(index, name)) for name in names}):
        yield called


def _counted(called, name, method):
    def count(*args, **options):
        called.append(name)
        return method(*args, **options)

    return count


@contextmanager
def index_down():
    error = IndexUnavailable("redis://localhost is down")
    index = engine.parts.index
    names = ("describe", "overviews", "kinds", "records", "enqueue", "delete", "pause")
    with mock.patch.multiple(index, **{name: mock.Mock(side_effect=error) for name in names}):
        yield


class AdminCase(TransactionCase):
    def setUp(self):
        super().setUp()
        self.client.force_login(User.objects.create_superuser("admin"))

    def failing_order(self):
        order = Order.objects.create(note="no box")
        with self.assertLogs(level="WARNING"):
            engine.enqueue(order.entity)
        return order

    def act(self, action, *orders, **more):
        return self.client.post(
            LIST, {"action": action, "_selected_action": [order.pk for order in orders], **more}, follow=True
        )

    def assert_said(self, answer, text):
        self.assertContains(answer, text)
        self.assertEqual(answer.status_code, 200)


class TheList(AdminCase):
    def test_shows_where_each_row_stands(self):
        Order.objects.create(status=Status.SHIPPED)
        failing = self.failing_order()
        later = Order.objects.create()
        engine.enqueue(later.entity, 7200)
        page = self.client.get(LIST)
        rows = dict(
            re.findall(r"<tr>.*?field-id[^>]*><a[^>]*>(\d+)</a>(.*?)</tr>", page.content.decode(), re.DOTALL)
        )
        [shipped] = set(rows) - {str(failing.pk), str(later.pk)}
        self.assertIn("✓ Shipped", rows[shipped])
        self.assertIn("Paid → Shipped", rows[str(failing.pk)])
        self.assertIn("RuntimeError: there is no box of that size", rows[str(failing.pk)])
        self.assertRegex(rows[str(later.pk)], r"in (2 h|12\d min|119\.\d min)")

    def test_costs_no_more_sql_than_any_other_and_one_call_of_the_index(self):
        class Plain(ModelAdmin):
            list_display = OrderAdmin.list_display

        for number in (1, 100):
            Order.objects.all().delete()
            Order.objects.bulk_create([Order() for _ in range(number)])
            counts = []
            for model_admin in (Plain(Order, site), OrderAdmin(Order, site)):
                with (
                    mock.patch.dict(site._registry, {Order: model_admin}),
                    CaptureQueriesContext(connection) as queries,
                    index_calls() as calls,
                ):
                    self.assertEqual(self.client.get(LIST).status_code, 200)
                counts.append((len(queries), len(calls)))
            plain, ours = counts
            self.assertEqual(ours, (plain[0], 1))

    def test_filters(self):
        shipped, failing = Order.objects.create(status=Status.SHIPPED), self.failing_order()
        for query, found in [
            ("converged=yes", [shipped]),
            ("converged=no", [failing]),
            ("goalstate=failing", [failing]),
            ("goalstate=scheduled", [failing]),
            ("goalstate=failed", []),
            ("goalstate=nonsense", [shipped, failing]),
        ]:
            with self.subTest(query):
                page = self.client.get(f"{LIST}?{query}")
                self.assertCountEqual(page.context["cl"].result_list, found)

    def test_a_filter_says_that_there_may_be_more(self):
        with mock.patch("celery_goalstate.contrib.django.admin.LONGEST_PAGE", 1):
            self.failing_order()
            self.assertContains(self.client.get(f"{LIST}?goalstate=failing"), "finds 1 rows at most")

    def test_without_the_index(self):
        Order.objects.create()
        with index_down():
            for query in ("", "?goalstate=failing"):
                page = self.client.get(LIST + query)
                self.assert_said(page, "The engine&#x27;s index does not answer")
            self.assertContains(self.client.get(LIST), ">?</td>", 2)


class Actions(AdminCase):
    def test_set_goal(self):
        orders = [Order.objects.create(), Order.objects.create(), Order.objects.create()]
        answer = self.act("goalstate_goal_1", *orders[:2])
        self.assert_said(answer, "2 rows: the goal is Cancelled.")
        self.assertEqual(
            list(Order.objects.order_by("pk").values_list("status", flat=True)),
            [Status.CANCELLED, Status.CANCELLED, Status.PAID],
        )
        self.assertEqual(
            {entry.get_change_message() for entry in LogEntry.objects.all()}, {"Goal set to Cancelled."}
        )
        self.assertEqual(LogEntry.objects.count(), 2)

    def test_there_are_none_where_the_class_wants_none(self):
        Order.objects.create()
        with mock.patch.object(OrderAdmin, "actions", None):
            self.assertNotContains(self.client.get(LIST), "goalstate_evaluate")
        self.assertNotContains(self.client.get(f"{LIST}?_popup=1"), "goalstate_evaluate")

    def test_choose_one_of_many_goals(self):
        order = Order.objects.create()
        with mock.patch("celery_goalstate.contrib.django.admin.GOAL_ACTIONS", 1):
            self.assert_said(self.act("goalstate_goal", order), '<option value="1">Cancelled</option>')
            self.assert_said(self.act("goalstate_goal", order, goal=7), "Which goal?")
            self.act("goalstate_goal", order, goal=1)
        order.refresh_from_db()
        self.assertEqual(order.status, Status.CANCELLED)

    def test_evaluate_now(self):
        order = Order.objects.create()
        self.assert_said(self.act("goalstate_evaluate", order), "1 row will be evaluated now.")
        order.refresh_from_db()
        self.assertEqual(order.status, Status.SHIPPED)

    def test_forget_is_asked_for_twice(self):
        order = self.failing_order()
        self.assert_said(self.act("goalstate_forget", order), "Forget what the engine knows?")
        self.assertIsNotNone(described(order))
        self.assert_said(
            self.act("goalstate_forget", order, confirmed="yes"), "1 row forgotten by the engine."
        )
        self.assertIsNone(described(order))

    def test_without_the_index_it_says_so(self):
        order = Order.objects.create()
        with index_down():
            self.assert_said(self.act("goalstate_evaluate", order), "Not done: the index does not answer.")
            with self.assertLogs("celery_goalstate", "ERROR"):
                self.assert_said(self.act("goalstate_goal_1", order), "the goal is Cancelled")
        order.refresh_from_db()
        self.assertEqual(order.wanted, Status.CANCELLED)


class TheForm(AdminCase):
    def url(self, order, *more):
        return "/".join([f"{LIST}{order.pk}", *(more or ["change"]), ""])

    def test_shows_what_the_engine_knows_and_the_rules(self):
        order = self.failing_order()
        with index_calls() as calls:
            page = self.client.get(self.url(order))
        self.assertEqual(len(calls), 1)
        text = page.content.decode()
        for part in (f"order/{order.pk}", "RuntimeError: there is no box of that size", "goalstate-matrix"):
            self.assertIn(part, text)
        self.assertRegex(
            text, r'<td class="goalstate-actions goalstate-present"[^>]*><strong>now: </strong>pack'
        )
        self.assertNotIn('name="status"', text)
        self.assertIn('name="wanted"', text)
        for forbidden in ("<script>", "style=", "onclick"):
            panel = text[text.index("goalstate-panel") : text.index("goalstate-buttons")]
            self.assertNotIn(forbidden, panel)

    def test_escapes_what_it_shows(self):
        order = Order.objects.create()

        def pack(entity, ctx):
            raise RuntimeError("<script>alert(1)</script>")

        with mock.patch("orders.entities.OrderEntity.pack", pack), self.assertLogs(level="WARNING"):
            engine.enqueue(order.entity)
        for url in (self.url(order), LIST):
            self.assertNotContains(self.client.get(url), "<script>alert")

    def test_the_first_button_saves(self):
        """It is the one that the key Enter presses."""
        text = self.client.get(self.url(Order.objects.create())).content.decode()
        form = text[text.index('id="order_form"') :]
        self.assertEqual(
            re.search(r'<(?:button|input) type="submit"[^>]*>', form)[0].count('name="_save"'), 1
        )

    def test_never_writes_the_state_that_it_was_opened_with(self):
        order = Order.objects.create(status=Status.PACKED)
        real = OrderAdmin.save_model

        def meanwhile(model_admin, request, obj, form, change):
            Order.objects.filter(pk=obj.pk).update(status=Status.SHIPPED, wanted=Status.CANCELLED)
            real(model_admin, request, obj, form, change)

        with mock.patch.object(OrderAdmin, "save_model", meanwhile):
            self.client.post(
                self.url(order), {"wanted": "shipped", "note": "gift", "packed": 3, "status": "paid"}
            )
        order.refresh_from_db()
        self.assertEqual(
            (order.status, order.wanted, order.note, order.packed),
            (Status.SHIPPED, Status.CANCELLED, "gift", 3),
        )

    def test_a_goal_that_is_changed_is_reached(self):
        order = Order.objects.create()
        self.client.post(self.url(order), {"wanted": "cancelled", "packed": 0})
        order.refresh_from_db()
        self.assertEqual((order.status, order.wanted), (Status.CANCELLED, Status.CANCELLED))

    def test_a_row_that_is_added_is_brought_to_its_goal(self):
        self.assertEqual(self.client.get(f"{LIST}add/").status_code, 200)
        self.client.post(f"{LIST}add/", {"wanted": "shipped", "packed": 0, "status": "cancelled"})
        self.assertEqual(Order.objects.get().status, Status.SHIPPED)

    def test_buttons(self):
        order = Order.objects.create()
        answer = self.client.post(self.url(order, "goalstate", "evaluate"), follow=True)
        self.assert_said(answer, "1 row will be evaluated now.")
        self.assertTrue(described(order).converged)
        forget = self.url(order, "goalstate", "forget")
        self.assert_said(self.client.post(forget), "Forget what the engine knows?")
        self.client.post(forget, {"confirmed": "yes"})
        self.assertIsNone(described(order))
        self.assertEqual(self.client.get(forget).status_code, 405)
        self.assertEqual(self.client.post(self.url(order, "goalstate", "explode")).status_code, 404)
        self.assertEqual(self.client.post(f"{LIST}999/goalstate/evaluate/").status_code, 404)

    def test_a_link_to_flower(self):
        order = Order.objects.create()
        engine.enqueue(order.entity)
        self.assertNotContains(self.client.get(self.url(order)), "/task/")
        import dataclasses

        settings = dataclasses.replace(engine.settings, flower_url="https://flower.example/")
        with engine.opened_with(engine.parts, settings):
            page = self.client.get(self.url(order))
        self.assertContains(page, f'href="https://flower.example/task/{described(order).task_id}"')

    def test_without_the_index(self):
        order = Order.objects.create()
        with index_down():
            self.assert_said(self.client.get(self.url(order)), "The engine&#x27;s index does not answer")


class Rights(AdminCase):
    def test_no_csrf_token_no_deed(self):
        order = Order.objects.create()
        client = Client(enforce_csrf_checks=True)
        client.force_login(User.objects.get())
        for url, data in [
            (f"{LIST}{order.pk}/goalstate/evaluate/", {}),
            (LIST, {"action": "goalstate_evaluate", "_selected_action": order.pk}),
            (OVERVIEW, {"verb": "pause", "kind": "order"}),
        ]:
            self.assertEqual(client.post(url, data).status_code, 403)
        self.assertIsNone(described(order))
        self.assertFalse(engine.paused("order"))

    def test_who_may_only_view_sees_no_buttons_and_presses_none(self):
        order = Order.objects.create()
        self.client.force_login(user("view_order"))
        page = self.client.get(f"{LIST}{order.pk}/change/")
        self.assertContains(page, "goalstate-matrix")
        self.assertNotContains(page, "formaction")
        self.assertEqual(self.client.post(f"{LIST}{order.pk}/goalstate/evaluate/").status_code, 403)
        self.assertNotContains(self.client.get(LIST), "goalstate_evaluate")
        self.act("goalstate_goal_1", order)
        order.refresh_from_db()
        self.assertEqual(order.wanted, Status.SHIPPED)
        self.assertIsNone(described(order))
        self.assertEqual(self.client.get(OVERVIEW).status_code, 403)
        self.assertEqual(self.client.post(OVERVIEW, {"verb": "pause", "kind": "order"}).status_code, 403)

    def test_who_may_see_the_overview_may_not_operate(self):
        self.client.force_login(user("view_overview"))
        self.assertNotContains(self.client.get(OVERVIEW), "Pause")
        self.assertEqual(self.client.post(OVERVIEW, {"verb": "pause", "kind": "order"}).status_code, 403)
        self.assertFalse(engine.paused("order"))

    def test_who_is_not_logged_in(self):
        self.client.logout()
        for url in (LIST, OVERVIEW):
            self.assertEqual(self.client.get(url).status_code, 302)


class TheOverview(AdminCase):
    def press(self, verb, kind="order"):
        return self.client.post(OVERVIEW, {"verb": verb, "kind": kind}, follow=True)

    def quarantine(self, order):
        from celery_goalstate.exceptions import PermanentError

        def pack(entity, ctx):
            raise PermanentError("<b>no such street</b>")

        with mock.patch("orders.entities.OrderEntity.pack", pack), self.assertLogs(level="WARNING"):
            engine.enqueue(order.entity)

    def test_shows_each_kind_in_two_calls(self):
        engine.enqueue(Order.objects.create().entity, 60)
        with index_calls() as calls:
            page = self.client.get(OVERVIEW)
        self.assertEqual(calls, ["overviews", "kinds"])
        kinds = re.findall(r'<th scope="row">(\S+)', page.content.decode())
        self.assertEqual(kinds, ["order", "parcel", "seat"])
        self.assertContains(page, f'<a href="{LIST}?goalstate=scheduled">1</a>')
        self.assertContains(self.client.get("/admin/"), OVERVIEW)

    def test_pause_and_resume(self):
        self.assert_said(self.press("pause"), "Paused: order.")
        self.assertTrue(engine.paused("order"))
        self.assertContains(self.client.get(OVERVIEW), "<strong>paused</strong>")
        self.press("resume")
        self.assertFalse(engine.paused("order"))
        self.assertEqual(
            [entry.get_change_message() for entry in LogEntry.objects.order_by("pk")],
            ["Paused: order.", "Resumed: order."],
        )

    def test_resync(self):
        order = Order.objects.create()
        self.assert_said(self.press("resync"), "Resync asked for: order.")
        self.assertIsNotNone(described(order))

    def test_quarantined_ones_and_retry_all(self):
        order = Order.objects.create()
        self.quarantine(order)
        page = self.client.get(OVERVIEW)
        self.assertContains(page, f'<a href="{LIST}{order.pk}/change/">{order.pk}</a>')
        self.assertContains(page, "&lt;b&gt;no such street")
        self.press("retry")
        order.refresh_from_db()
        self.assertEqual(order.status, Status.SHIPPED)

    def test_what_there_is_not(self):
        for verb, kind in [("explode", "order"), ("pause", "ordr"), ("pause", "")]:
            self.assertEqual(self.press(verb, kind).status_code, 400)

    def test_without_the_index(self):
        with index_down():
            self.assert_said(self.client.get(OVERVIEW), "index does not answer")
            self.assert_said(self.press("pause"), "Not done: the index does not answer.")
