"""From files to batches: tokenizer, data sets, loader, packing, rule-based scores.

Read `datasets` for the records and the batches they become, `loader` for their order,
`packing` for how rows of one length hold sequences of many, and `reviews` for the
corpus the first examples train on.
"""
