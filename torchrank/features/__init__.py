"""Feature declarations and the one implementation of every operator, used in training and serving alike.

    spec.py       what a user writes: columns and features
    schema.py     what a model sees: which feature sits in which columns of which input
    batch.py      what the operators write: FeatureBatch

No module here imports torch.
"""
