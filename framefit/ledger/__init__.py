"""What a run did: seconds and peak memory by phase, and what it had to tell the user."""

from framefit.ledger.phases import Ledger, Phase
from framefit.ledger.steps import MemoryReading, StepLog, read_memory

__all__ = ["Ledger", "MemoryReading", "Phase", "StepLog", "read_memory"]
