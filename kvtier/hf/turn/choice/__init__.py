"""The choice between loading and computing a prefix: what it goes by, how it is carried out, and what a turn took."""
