"""Laws of the parsers of untrusted bytes: frames, control frames, /proc, exit statuses."""

from __future__ import annotations

import os
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from airgap.enclave import channel, evidence, host, plan, process, root, seal, twin
from policy.errors import AirgapError


@given(st.binary(max_size=200), st.integers(0, 64))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_frame_or_a_named_breach(content, cap):
    read, write = os.pipe()
    try:
        os.write(write, content)
        os.close(write)
        try:
            frame = channel.Reader(read).read(
                (channel.REPLY,), cap=cap, deadline=time.monotonic() + 1
            )
        except channel.ChannelError as error:
            assert error.kind in {"over", "short", "late", "unknown", "closed"}  # noqa: PT017
        else:
            assert len(frame.payload) <= cap
    finally:
        os.close(read)


@given(
    st.sampled_from([channel.REPLY, channel.PART]),
    st.binary(max_size=500),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_encoding_and_reading_are_inverse(kind, payload, request):
    read, write = os.pipe()
    try:
        os.write(write, channel.encode(kind, payload, request))
        frame = channel.Reader(read).read((kind,), cap=500, deadline=time.monotonic() + 1)
        assert (frame.kind, frame.payload, frame.request) == (kind, payload, request)
    finally:
        os.close(read)
        os.close(write)


@given(st.sampled_from([channel.ERROR, channel.FAULT]), st.binary(max_size=300))
def test_any_error_frame_becomes_an_error_of_ours(kind, payload):
    try:
        made = process.program_error(channel.Frame(kind, 1, payload), "")
    except AirgapError as error:
        made = error
    assert isinstance(made, AirgapError)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=10,
)


@given(json_values)
def test_any_control_json_is_an_object_or_refused(value):
    import json

    def self_test(payload):
        return seal._self_test(payload, {"last": "stage2"})

    for read in (process.json_object, self_test):
        try:
            read(json.dumps(value).encode())
        except AirgapError as error:
            assert error.code in {"enclave.channel", "enclave.stage2"}  # noqa: PT017


@given(st.text(max_size=300))
def test_proc_parsers_return_or_skip(text):
    host.parse_status(text)
    host.parse_mounts(text)
    for line in text.splitlines():
        root.unescape(line)


@given(
    st.lists(st.sampled_from(["/", "/a", "/a/b", "/ab", "/a/bc", "/usr", "/usr/lib"]), max_size=8)
)
def test_pruned_paths_cover_all_and_never_each_other(paths):
    kept = plan.prune(paths)
    for path in paths:
        assert any(path == k or path.startswith(k.rstrip("/") + "/") for k in kept)
    for one in kept:
        assert not any(one != k and one.startswith(k.rstrip("/") + "/") for k in kept)


@given(st.integers(-64, 255))
def test_an_end_is_a_status_or_a_signal(status):
    end = process.exit_of(status)
    assert (end["status"] is None) != (end["signal"] is None)


@given(json_values)
def test_a_report_of_any_shape_never_proves_a_seal(value):
    report = value if isinstance(value, dict) else {"control": {}, "stage1": {}}
    safe = {key: v for key, v in report.items() if key not in {"control", "stage1", "stage2"}}
    safe.pop("received", None), safe.pop("refused", None), safe.pop("convert", None)
    assert not twin.judge(safe).sealed


def test_a_digest_of_a_document_does_not_depend_on_its_order():
    one, other = {"a": 1, "b": [2]}, {"b": [2], "a": 1}
    assert evidence.digest_of(one) == evidence.digest_of(other)
    assert evidence.digest_of(one) != evidence.digest_of({"a": 1, "b": [3]})
