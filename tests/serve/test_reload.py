"""Versions come, go and fail while requests run; no request notices."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sbs_edge.errors import AnswerError, IntegrityError, UsageError
from sbs_edge.serve.inference_request import InferenceRequest, Timing
from sbs_edge.serve.models import parse_source
from sbs_edge.serve.server import create_service
from sbs_edge.serve.settings import ServeSettings


def served(hand, *sources, **options):
    engines = []

    def load(path):
        engine = hand.load(path)
        engines.append(engine)
        return engine

    service = create_service(sources, ServeSettings(**options), load)
    service.engines = engines
    return service


@pytest.mark.anyio
async def test_a_new_version_takes_over_under_load_and_a_bad_one_does_not(hand, tmp_path):
    folder = tmp_path / "models"
    hand.write(folder / "1", "1", label_s=0.005)

    service = served(hand, ("desk", folder))
    await service.registry.refresh(first=True)
    service.started = True
    seen: set[str] = set()
    stop = False
    failures: list[BaseException] = []
    count = 0

    async def client(i):
        nonlocal count
        while not stop:
            try:
                version = service.registry.find("desk")
                answers = await service.answer(version, InferenceRequest([f"text {i} {count}"]), Timing())
                assert answers[0]["label"]
                seen.add(version.card.version)
                count += 1
            except BaseException as error:
                failures.append(error)
                raise

    clients = [asyncio.create_task(client(i)) for i in range(8)]
    for number in range(2, 8):
        await asyncio.sleep(0.03)
        if number == 4:
            hand.write(folder / "4", "4", broken=True)
        else:
            hand.write(folder / str(number), str(number), label_s=0.005)
        await service.registry.refresh()
    hand.write(folder / "10", "10")
    await service.registry.refresh()
    await asyncio.sleep(0.05)
    stop = True
    await asyncio.gather(*clients)
    assert failures == []
    assert count > 30
    assert "4" not in seen
    assert {"1", "10"} <= seen
    model = service.registry.by_name["desk"]
    assert list(model.versions) == ["7", "10"]  # the newest two, counted as people count
    alive = [e.version for e in service.engines if not e.closed]
    assert sorted(alive) == ["10", "7"]
    refused = service.metrics.registry.get_sample_value(
        "sbs_edge_reloads_total", {"model": "desk", "result": "refused"}
    )
    assert refused == 1  # remembered: not tried again at each look
    await service.close()
    assert all(e.closed for e in service.engines)


@pytest.mark.anyio
async def test_a_retired_version_finishes_its_requests_before_it_closes(hand, tmp_path):
    hand.write(tmp_path / "b", "1", label_s=0.2)

    service = served(hand, ("m", tmp_path / "b"))
    await service.registry.refresh(first=True)
    old = service.registry.find("m")
    running = asyncio.create_task(service.answer(old, InferenceRequest(["slow"]), Timing()))
    await asyncio.sleep(0.05)
    hand.write(tmp_path / "b", "2")
    await service.registry.refresh()
    new = service.registry.find("m")
    assert new.card.version == "2"
    assert not old.engine.closed
    assert (await service.answer(new, InferenceRequest(["quick"]), Timing()))[0]["label"]
    assert not running.done()
    assert (await running)[0]["label"] == old.engine.answer("slow").label
    assert old.engine.closed
    await service.close()


@pytest.mark.anyio
async def test_in_place_damage_keeps_the_old_bundle_and_a_repair_is_taken(hand, tmp_path):
    bundle = hand.write(tmp_path / "b", "1")

    service = served(hand, ("m", bundle))
    await service.registry.refresh(first=True)
    for damage in ("{", json.dumps({"broken": True}), json.dumps({"unknown": 1})):
        (bundle / "manifest.json").write_text(damage)
        await service.registry.refresh()
        assert service.registry.find("m").card.version == "1"
        assert service.registry.ready
    (bundle / "manifest.json").unlink()
    await service.registry.refresh()
    shutil.rmtree(bundle)
    await service.registry.refresh()
    assert service.registry.find("m").card.version == "1"
    hand.write(bundle, "2")
    await service.registry.refresh()
    assert service.registry.find("m").card.version == "2"
    await service.close()


@pytest.mark.anyio
async def test_a_bad_bundle_at_the_start_is_an_error_never_ready(hand, tmp_path):
    hand.write(tmp_path / "good", "1")
    hand.write(tmp_path / "bad", "1", broken=True)

    service = served(hand, ("good", tmp_path / "good"), ("bad", tmp_path / "bad"))
    with pytest.raises(IntegrityError):
        await service.registry.refresh(first=True)
    assert not service.ready
    await service.close()
    (tmp_path / "nothing").mkdir()
    empty = served(hand, ("none", tmp_path / "nothing"))
    with pytest.raises(IntegrityError, match="not a bundle"):
        await empty.registry.refresh(first=True)
    await empty.close()
    twice = served(hand, (None, tmp_path / "good"), (None, tmp_path / "good"))
    with pytest.raises(UsageError, match="Two bundles are called 'hand'"):
        await twice.registry.refresh(first=True)
    await twice.close()


def test_sources_are_names_and_paths():
    assert parse_source("desk=a/b")[0] == "desk"
    assert parse_source("a/b")[0] is None
    for name in ("", "..", "a/b", "-x"):
        with pytest.raises(UsageError):
            parse_source(f"{name}=path")


def publish(hand, folder, version, broken):
    """Replace a version's bundle as a careful operator does: written aside, then renamed."""
    aside = hand.write(folder / f".{version}", version, **({"broken": True} if broken else {}))
    shutil.rmtree(folder / version, ignore_errors=True)
    aside.rename(folder / version)


versions = st.sampled_from(["1", "2", "3", "10"])
steps = st.lists(
    st.tuples(st.just("publish"), versions, st.booleans())
    | st.tuples(st.just("remove"), versions)
    | st.tuples(st.just("damage"), versions)
    | st.tuples(st.just("ask"), st.integers(1, 12))
    | st.tuples(st.just("settle")),
    min_size=3,
    max_size=14,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
@pytest.mark.anyio
async def test_no_order_of_changes_fails_a_request(hand, tmp_path_factory, steps):
    """Whatever appears, breaks or goes, at whatever moment: requests are answered by a version that loaded."""
    folder = tmp_path_factory.mktemp("models")
    hand.write(folder / "1", "1")

    service = served(hand, ("desk", folder))
    await service.registry.refresh(first=True)
    refreshes, asked = [], []

    async def ask(text):
        version = service.registry.find("desk")
        return (
            text,
            version,
            await service.answer(version, InferenceRequest([text], explain=True), Timing()),
        )

    for step in steps:
        match step:
            case ("publish", version, broken):
                publish(hand, folder, version, broken)
            case ("remove", version):
                shutil.rmtree(folder / version, ignore_errors=True)
            case ("damage", version):
                if (folder / version).is_dir():
                    (folder / version / "manifest.json").write_text("{")
            case ("ask", n):
                asked += [asyncio.create_task(ask(f"text {len(asked)} {i}")) for i in range(n)]
            case _:
                await asyncio.gather(*refreshes)
        refreshes.append(asyncio.create_task(service.registry.refresh()))
        await asyncio.sleep(0)
        assert service.registry.ready
    for text, version, answers in await asyncio.gather(*asked):
        assert answers[0]["label"] == version.engine.answer(text).label
        assert answers[0]["rationale"] == "because " + text[::-1]
    await asyncio.gather(*refreshes)
    alive = [engine for engine in service.engines if not engine.closed]
    serving = [v.engine for v in service.registry.by_name["desk"].versions.values()]
    assert sorted(map(id, alive)) == sorted(map(id, serving))
    await service.close()


@pytest.mark.parametrize("damage", ["manifest", "no manifest", "empty manifest"])
@pytest.mark.anyio
async def test_a_version_rewritten_in_place_keeps_answering_until_a_good_one_is_there(hand, tmp_path, damage):
    """Clients never fall back to an older version because the newest one is being copied over."""
    for version in ("1", "2"):
        hand.write(tmp_path / "m" / version, version)
    manifest = tmp_path / "m" / "2" / "manifest.json"

    service = served(hand, ("desk", tmp_path / "m"))
    await service.registry.refresh(first=True)
    old = service.registry.find("desk")
    assert (old.card.version, service.registry.problems) == ("2", [])

    def sample(name, **labels):
        return service.metrics.registry.get_sample_value(name, {"model": "desk", **labels})

    if damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("" if damage == "empty manifest" else json.dumps({"broken": True}))
    for _ in range(3):  # looked at again and again while the copy goes on
        await service.registry.refresh()
        assert service.registry.find("desk") is old
        assert service.registry.ready
        assert set(service.registry.by_name["desk"].versions) == {"1", "2"}
    (problem,) = service.registry.problems
    assert "desk, version 2" in problem
    assert "loaded before still answers" in problem
    assert str(tmp_path) not in problem
    assert sample("sbs_edge_stale_versions") == 1
    assert sample("sbs_edge_reloads_total", result="refused") >= 1
    assert sample("sbs_edge_reloads_total", result="retired") is None

    hand.write(tmp_path / "m" / "2", "2", labels=["yes", "no"])
    await service.registry.refresh()
    new = service.registry.find("desk")
    assert new is not old
    assert new.card.version == "2"
    assert new.card.labels == ("yes", "no")
    assert service.registry.problems == []
    assert sample("sbs_edge_stale_versions") == 0
    shutil.rmtree(tmp_path / "m" / "2")  # removed: that is how a version is withdrawn
    await service.registry.refresh()
    assert service.registry.find("desk").card.version == "1"
    await service.close()


@pytest.mark.anyio
async def test_an_answer_that_is_not_finite_is_a_500_and_turns_readiness_off(running, hand_bundle, hand):
    class Unsound(hand.Engine):
        def predict(self, texts, labels=None, **options):
            if "nan" in " ".join(texts):
                raise AnswerError("The target computed a score that is not finite.")
            return super().predict(texts, labels, **options)

    async with running(hand_bundle, Unsound()) as app:
        assert (await app.client.get("/v2/health/ready")).json() == {"ready": True}
        good, bad = await asyncio.gather(app.predict(["fine"]), app.predict(["nan"]))
        assert (good.status_code, bad.status_code) == (200, 500)
        ready = await app.client.get("/v2/health/ready")
        assert ready.status_code == 503
        assert ready.json()["ready"] is False
        assert "not finite" in ready.json()["problems"][0]
        assert (await app.client.get("/v2/health/live")).status_code == 200
        await app.service.registry.refresh(retry_refused=True)  # SIGHUP: loaded again
        assert (await app.client.get("/v2/health/ready")).json() == {"ready": True}
