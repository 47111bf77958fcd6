"""A pair of networks, ``f`` and its approximate inverse ``g``, at a batch of events.

Everything is computed from products with Jacobians (:mod:`~pyro_snf.free_form.linearization`). A
product costs about as much as a pass through the network. The log-determinant and its surrogate
gradient are in :mod:`~pyro_snf.free_form.log_det`, the methods that use them in training in
:mod:`~pyro_snf.free_form.methods`, and the inverse is in :mod:`~pyro_snf.free_form.solve`. The
penalty that makes g the inverse of f is in :mod:`~pyro_snf.free_form.reconstruction`, and the
checks of the networks are in :mod:`~pyro_snf.free_form.network_pair`.
"""
