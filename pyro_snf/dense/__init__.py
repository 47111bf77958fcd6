"""The algebra of a dense weight ``A = I + Θ/√D``: products, log-determinants and inverses.

One module for each way to get ``log|det A|``: :mod:`~pyro_snf.dense.exact`,
:mod:`~pyro_snf.dense.learned` (the paper) and :mod:`~pyro_snf.dense.tracked` (refined), for which
:mod:`~pyro_snf.dense.lookout` and :mod:`~pyro_snf.dense.schedule` decide when there is something
to do. Their common ground is :mod:`~pyro_snf.dense.near_identity`;
:mod:`~pyro_snf.dense.affine` is the map and its log-determinant in one node of the graph, and
:mod:`~pyro_snf.dense.solve` inverts.
"""
