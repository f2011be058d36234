"""What every index does: one suite, and one state machine, over all of them."""
