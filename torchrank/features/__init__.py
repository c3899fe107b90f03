"""Feature declarations and the one implementation of every operator, used in training and serving alike.

    spec.py           what a user writes: columns and features; declared.py reads it out of YAML or JSON
    schema.py         what a model sees: which feature sits in which columns of which input
    transform.py      FeatureTransform: from an Arrow batch or a request to a FeatureBatch
    columns.py        raw columns in one form; arrow_columns.py makes them from Arrow
    operators.py      the operators, on ids.py (value to id) and hashing.py (Spark's xxhash64)
    batch.py          what the operators write: FeatureBatch

No module here imports torch, and none but arrow_columns.py imports pyarrow.
"""
