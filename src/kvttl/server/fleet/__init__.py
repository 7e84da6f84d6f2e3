"""A package for LMCache's coordinator, which looks for controllers in it.

``--extra-config '{"controller_packages": ["kvttl.server.fleet"], "kvttl": {"settings": {...},
"networks": ["10.1.0.0/16"]}}'``
"""
