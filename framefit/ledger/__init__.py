"""What a run did: seconds and peak memory by phase, and what it had to tell the user."""

from framefit.ledger.phases import Ledger, Phase

__all__ = ["Ledger", "Phase"]
