"""A Faust app as a user would write it: `faust -A worker:app worker`, its settings in the environment."""

from __future__ import annotations

import os
import time

import faust
from faust.sensors.prometheus import setup_prometheus_sensors

import streamrec as sr
from streamrec.adapters.faust import join, profiles, score, train
from streamrec.trainers import Callback

env = os.environ
app = faust.App(
    env["APP_ID"],
    broker=f"kafka://{env['BROKER']}",
    store="memory://",
    datadir=env["DATADIR"],
    broker_session_timeout=float(env.get("SESSION", "4")),
    broker_heartbeat_interval=0.5,
    web_port=int(env.get("WEB_PORT", "6066")),
    web_enabled="WEB_PORT" in env,
    debug="WEB_PORT" in env,  # Faust shows its counters only then
    # for tansu, which tells the ends of batches too low: a table would come back short
    producer_max_batch_size=1 if "PROFILES" in env else 16_384,
    stream_wait_empty=False,
)
timeout = float(env.get("TIMEOUT", "60"))
schema = sr.Schema(sr.Id("user"), sr.Id("item"))


class Slow(sr.Dedup):
    """So that there is something left to kill; and a Dedup that forgets nothing, to tell what came twice."""

    def push(self, events):  # type: ignore[no-untyped-def]
        time.sleep(float(env.get("SLOW", "0")))
        return super().push(events)


class Heard(Callback):
    """Writes down what it is told."""

    every = 100

    def _write(self, name, progress):  # type: ignore[no-untyped-def]
        with open(env["HEARD"], "a") as file:
            file.write(f"{name} {progress.events}\n")

    def __getattribute__(self, name):  # type: ignore[no-untyped-def]
        if name.startswith("on_"):
            return lambda progress, *told: self._write(name, progress)
        return super().__getattribute__(name)


trainer = sr.OnlineTrainer(
    model=sr.FM(schema, dim=4),
    preprocessors=[Slow(ttl=1e9, capacity=1_000_000)],
    metrics=[sr.CTR()],
    store=env["STORE"],
    checkpoint_every=int(env.get("EVERY", "2000")),
    checkpoint_seconds=1.0,
    callbacks=[Heard()] if "HEARD" in env else [],
)
# compiled before the loop runs
sr.OnlineTrainer(model=sr.FM(schema, dim=4)).push([sr.Labeled(sr.Impression("i", 1000.0, "u", "p"), 1.0)])

if "TOPIC" in env:
    train(
        app,
        env["TOPIC"],
        trainer,
        seconds=0.2,
        dead_letters=env.get("DEAD"),
        notices=env.get("NOTICES"),
        timeout=timeout,
    )
if "JOIN" in env:
    join(
        app,
        env["JOIN"],
        env["EXAMPLES"],
        lambda: [sr.LabelJoin(windows={"click": 60.0})],
        store=env["STORE"] + "-joins",
        checkpoint_seconds=0.3,
        seconds=0.2,
        timeout=timeout,
        batch=100,
    )
if "METRICS" in env:
    setup_prometheus_sensors(app)
if "REQUESTS" in env:
    score(app, env["REQUESTS"], env["RESPONSES"], sr.Scorer(env["STORE"]), dead_letters=env.get("DEAD"))
if "PROFILES" in env:
    table = profiles(app, env["PROFILES"], name="profiles", half_life=100.0, partitions=1)

    @app.page("/profile/{user}/")
    async def profile(self, request, user):  # type: ignore[no-untyped-def]
        return self.json(table.get(user))
