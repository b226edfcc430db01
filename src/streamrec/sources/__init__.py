"""Where events come from: any object with the three methods of `streamrec.protocols.Source` will do."""

from streamrec.sources.json_lines import JsonLines
from streamrec.sources.kafka import Kafka
from streamrec.sources.memory import Memory

__all__ = ["JsonLines", "Kafka", "Memory"]
