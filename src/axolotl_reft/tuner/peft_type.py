"""LOREFT as a member of PEFT's closed enumeration of methods.

Saving looks a method up in ``PeftType`` itself, so a plain string that merely loads
would fail at the first save.
"""

from __future__ import annotations

from peft import PeftType


def _extend_peft_type(name: str) -> PeftType:
    """Add a member to ``PeftType`` as its class body would have; once."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType)
    member.__objclass__ = PeftType
    # Patch: PEFT looks methods up in its own enumeration.
    # The attribute first: the metaclass refuses to set one that the map already holds.
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


LOREFT = _extend_peft_type("LOREFT")
