"""The algebra of a "same" convolution as a linear map of images: products, log-dets, inverses.

One module for each way to get ``log|det J|`` of the convolution's matrix J:
:mod:`~pyro_snf.conv.exact`, :mod:`~pyro_snf.conv.learned` (the paper) and
:mod:`~pyro_snf.conv.refined`. Their common ground is :mod:`~pyro_snf.conv.kernels`.
"""
