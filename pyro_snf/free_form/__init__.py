"""The algebra of a pair of networks, ``f`` and its approximate inverse ``g``, at a batch of events.

All of it stands on products with Jacobians (:mod:`~pyro_snf.free_form.linearization`), which cost
about as much as a pass through the network: the log-determinant and its surrogate gradient
(:mod:`~pyro_snf.free_form.log_det`), which in training go with the penalty that makes g the inverse
of f (:mod:`~pyro_snf.free_form.estimator`), and the inverse itself
(:mod:`~pyro_snf.free_form.solve`). What the networks have to be for this is checked in
:mod:`~pyro_snf.free_form.pair`.
"""
