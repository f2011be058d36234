"""Somebody else's service in the examples: it sends a truck for each booking, but one for a reference."""

_bookings = []


def reset():
    _bookings.clear()


def book(id, reference=None):
    if reference is None or (id, reference) not in _bookings:
        _bookings.append((id, reference))


def bookings():
    return _bookings
