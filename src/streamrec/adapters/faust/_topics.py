"""Topics by name, raw; the app's own way to its brokers."""

from __future__ import annotations

from typing import Any

from streamrec.errors import ConfigError

__all__ = ["client", "raw_topic", "topic_name"]


def topic_name(topic: Any) -> str:
    """The name of a topic: a string, or one of Faust's channels of exactly one topic."""
    if isinstance(topic, str) and topic:
        return topic
    names = list(getattr(topic, "topics", None) or ())
    if len(names) != 1:
        raise ConfigError(f"topic must be a name, or app.topic() of one name, got {topic!r}")
    return str(names[0])


def raw_topic(app: Any, topic: Any) -> Any:
    """A topic whose values are the bytes as they came: our decoders read them, and no bad one stops a stream."""
    return app.topic(topic_name(topic), key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")


def client(app: Any, *, servers: bool = True) -> dict[str, Any]:
    """The app's own way to its brokers, as settings for aiokafka."""
    from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth

    conf = app.conf
    auth = dict(credentials_to_aiokafka_auth(conf.broker_credentials, conf.ssl_context))
    auth["client_id"] = conf.broker_client_id
    if servers:
        auth["bootstrap_servers"] = [f"{url.host}:{url.port or 9092}" for url in conf.broker]
    return auth
