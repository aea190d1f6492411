"""Which drafted tokens stay: lossless rules, and relaxed ones that say so."""
