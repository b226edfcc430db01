"""Where events come from: any object with the three methods of `streamrec.protocols.Source` will do."""

from streamrec.sources.csv import Csv
from streamrec.sources.http_poll import HttpPoll
from streamrec.sources.json_lines import JsonLines
from streamrec.sources.kafka import Kafka
from streamrec.sources.memory import Memory
from streamrec.sources.merged import Merged
from streamrec.sources.parquet import Parquet
from streamrec.sources.push import Push

__all__ = ["Csv", "HttpPoll", "JsonLines", "Kafka", "Memory", "Merged", "Parquet", "Push"]
