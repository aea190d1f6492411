"""Which answers there may be: grammars, predicates, and states of them in trees."""
