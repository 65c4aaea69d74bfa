"""The recipes of a Megatron-LM checkout, made small and trained with and without a measurement.

``small`` reads and shrinks them, ``trial`` trains one both ways and compares what it left, which of
its checkpoints ``checkpoints`` reads, ``results`` is the JSON of all and the table that is made of
it, and ``python -m tests.megatron.recipes`` the command.
"""
