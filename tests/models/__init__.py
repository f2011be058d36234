"""Small models of the index's rules, and each rule broken to see that it is needed."""
