"""The base model as it is run: what it is, in what it computes, how its products are made."""
