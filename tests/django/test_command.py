"""`manage.py goalstate` is `celery goalstate`."""

from __future__ import annotations

from tests.django.conftest import Shop


def test_from_a_shell_and_from_code(served: Shop) -> None:
    shop = served

    def both(*words: str, status: int = 0) -> str:
        """What either command prints; the same, but for the name of the program."""
        printed = shop.manage("goalstate", *words, status=status)
        celerys = shop.run("-m", "celery", "-A", "shop", "goalstate", *words, status=status)
        assert printed == celerys.replace("python -m celery goalstate", "manage.py goalstate")
        return printed

    assert "order/7: scheduled" in shop.manage(
        "goalstate", "enqueue", "order", "7", "--at", "2099-01-01T00:00Z"
    )
    assert "order/7" in both("list", "--kind", "order")
    assert "order/8 is not known" in both("show", "order", "8", status=1)
    assert "'ordr'" in both("enqueue", "ordr", "7", status=2)
    assert "Usage: manage.py goalstate" in both("--help")
    assert "order/7" in shop.manage(
        "goalstate", "list", "--settings=shop.settings", "--kind", "order", "--pythonpath", "."
    )

    printed = shop.python("""
from io import StringIO
from django.core.management import CommandError, call_command
out, err = StringIO(), StringIO()
call_command("goalstate", "--namespace", "default", "list", kind := "--kind", "order", stdout=out)
assert "order/7" in out.getvalue(), out.getvalue()
call_command("goalstate", "delete", "order", 7)
for words, status, text in [
    (("show", "order", "8"), 1, "exit code 1"),
    (("enqueue", "ordr", "7"), 2, "Did you mean order?"),
    (("--nonsense",), 2, "--nonsense"),
]:
    try:
        call_command("goalstate", *words, stderr=err)
    except CommandError as error:
        assert (error.returncode, text in str(error)) == (status, True), (words, error, error.returncode)
assert "order/8 is not known" in err.getvalue()
print("done")
""")
    assert printed == "order/7: deleted\ndone\n"


def test_without_an_engine(served: Shop) -> None:
    (served.directory / "bare.py").write_text(
        "SECRET_KEY = 'x'\nINSTALLED_APPS = ['celery_goalstate.contrib.django']\n"
    )
    printed = served.manage("goalstate", "list", status=2, DJANGO_SETTINGS_MODULE="bare")
    assert "has no engine; create one beside it" in printed
    assert "Traceback" not in printed
