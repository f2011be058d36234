"""The reader's own code in the examples: a warehouse, its orders in a file that all processes share."""

import sqlite3

_SCHEMA = (
    "create table if not exists orders"
    " (id text primary key, status text, wanted text, weighed int, fence int default 0)"
)


def _run(sql, *values):
    with sqlite3.connect("warehouse.sqlite3", timeout=10) as db:
        db.execute(_SCHEMA)
        return db.execute(sql, values).fetchall()


def place(id):
    _run("insert or replace into orders (id, status, wanted, weighed) values (?, 'paid', 'shipped', 0)", id)


def cancel(id):
    _run("update orders set wanted = 'cancelled' where id = ?", id)


def status(id):
    return _run("select status from orders where id = ?", id)[0][0]


def wanted(id):
    return _run("select wanted from orders where id = ?", id)[0][0]


def pack(id):
    _run("update orders set status = 'packed' where id = ?", id)


def ship(id):
    if id.startswith("lost"):
        raise ConnectionError("the carrier does not answer")
    _run("update orders set status = 'shipped' where id = ?", id)


def refund(id):
    _run("update orders set status = 'cancelled' where id = ?", id)


def unfinished():
    return [id for (id,) in _run("select id from orders where status != wanted order by id")]
