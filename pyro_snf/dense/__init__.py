"""The algebra of a dense weight ``A = I + Θ/√D``: products, log-determinants and inverses.

One module for each way to get ``log|det A|``: :mod:`~pyro_snf.dense.exact`,
:mod:`~pyro_snf.dense.learned` (the paper) and :mod:`~pyro_snf.dense.tracked` (refined). Their
common ground is :mod:`~pyro_snf.dense.near_identity`; :mod:`~pyro_snf.dense.solve` inverts.
"""
