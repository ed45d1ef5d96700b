"""Evidence of somebody else about the origin of a model: read strictly, verified offline.

Both sides use it: staging before it seals, and `airgap verify --deep` on what a bundle carries.
Only `bundle.evidence.sigstore` needs a library of the extra `staging`, and only when it is called.
"""
