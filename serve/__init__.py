"""What callers touch: the contract, the front doors, the pipeline and the store. No torch here."""
