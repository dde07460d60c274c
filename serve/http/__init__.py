"""HTTP front doors: each translates to GenerateRequest and back, with no logic of its own."""
