"""DMC's operations on tensors; `reference` is the specification that every kernel is tested against."""
