"""A service that ships what it is asked to ship, once for each number."""

shipped: set[int] = set()


def ship(number: int) -> None:
    shipped.add(number)
