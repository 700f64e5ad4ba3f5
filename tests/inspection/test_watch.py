"""The server of --watch: what it serves, to whom, and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

import inspect_model
from core.inspection.html import watch as module
from core.inspection.html.watch import Watch, is_local, serve
from tests.inspection.test_page import Read
from tests.makers.models import save_durably, started, update

LIMIT = 60
"""Seconds within which a server must have started or ended."""


@pytest.fixture
def model(tmp_path):
    made, net, optimizer = started(tmp_path)
    save_durably(made, net, optimizer, step=1)
    yield made, net, optimizer, tmp_path / "dante"
    made.close()


@pytest.fixture
def served(model):
    server = module._server(Watch(model[3]), 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join(LIMIT)


def get(port, path="/", host="localhost", method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
    connection.request(method, path, headers={"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer


def test_the_page_is_newer_when_the_run_has_logged_or_saved(model, served):
    made, net, optimizer, folder = model
    status, text, answer = get(served)
    read = Read(text)
    assert status == 200 and answer.headers["Cache-Control"] == "no-store" and read.faults == []
    version = dict(read.attributes)["data-version"]
    assert get(served, "/version")[1] == version and "connect-src 'self'" in text
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 4.5, "learning_rate": 1e-3}) + "\n")
    logged = get(served, "/version")[1]
    assert logged != version and Read(get(served)[1]).has("Train loss from 4.5 at step 1")
    update(net, optimizer)
    save_durably(made, net, optimizer, step=2)
    assert get(served, "/version")[1] not in (version, logged)
    assert "<small>step</small><b>2</b>" in get(served)[1]
    assert get(served)[1] == get(served)[1]


def test_weights_are_read_again_only_when_a_step_was_saved(model, monkeypatch):
    made, net, optimizer, folder = model
    reads, of = [], module.Weights.of
    monkeypatch.setattr(module.Weights, "of", lambda found, progress: reads.append(found.step) or of(found, progress))
    watch = Watch(folder)
    for line in range(3):
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 4.0 + line}) + "\n")
        watch.page()
    assert reads == [1]
    update(net, optimizer)
    save_durably(made, net, optimizer, step=2)
    watch.page()
    assert reads == [1, 2]


def test_what_breaks_leaves_the_page_before_it(model):
    folder = model[3]
    watch = Watch(folder)
    before = watch.page()
    folder.rename(folder.with_name("moved"))
    assert watch.page() == before
    assert b"Nothing to show yet" in Watch(folder / "nothing").page()


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("localhost:8000", True),
        ("127.0.0.1:1", True),
        ("[::1]:8000", True),
        ("LOCALHOST", True),
        ("evil.example", False),
        ("localhost.evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
        ("evil.example@localhost.evil", False),
        ("[", False),
        ("", False),
        (None, False),
    ],
)
def test_only_names_of_this_machine_are_answered(host, local):
    assert is_local(host) is local


def test_a_foreign_host_and_other_addresses_get_nothing(served):
    assert get(served, host="evil.example")[:2] == (403, "This page is for this machine alone.\n")
    assert get(served, "/version", host="evil.example:80")[0] == 403
    assert get(served, "/../model.pt")[0] == 404
    assert get(served, method="POST")[0] == 501


def test_a_taken_port_is_followed_by_the_next_free_one_which_is_said(model, monkeypatch):
    said = []
    monkeypatch.setattr(module.ThreadingHTTPServer, "serve_forever", lambda self, poll_interval: 1 / 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ZeroDivisionError):
            serve(Watch(model[3]), port, said.append)
    number = int(re.search(r"http://127\.0\.0\.1:(\d+)/", said[0])[1])
    assert said[0].startswith(f"port {port} is taken; watching {model[3]} at ") and port < number <= port + 100


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_with_0(model):
    command = [sys.executable, inspect_model.__file__, str(model[3]), "--watch", "--port", "0", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        port = int(re.search(r":(\d+)/ \(Ctrl-C ends\)", line)[1])
        assert get(port)[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "8000"], "--port needs --watch"),
        (["--watch", "--json"], "leave out --json"),
        (["--watch", "--html", "x.html"], "leave out --html"),
        (["--watch", "--port", "70000"], "--port"),
    ],
)
def test_flags_that_do_not_fit_are_said(model, flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        inspect_model.main([str(model[3]), *flags])
    assert ended.value.code == 2 and said in capsys.readouterr().err
