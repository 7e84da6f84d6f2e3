"""Decision records: what they hold, their log, metrics and notices."""

from kvttl.decisions.log import DecisionLog, read_records, to_frame
from kvttl.decisions.record import DecisionRecord

__all__ = ["DecisionLog", "DecisionRecord", "read_records", "to_frame"]
