"""`tprt serve`: an OpenAI-compatible HTTP server in front of the processes of one deployment."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Annotated

import typer

from launch.config_file import load_config
from launch.deployment import Deployment
from launch.options import ConfigArgument, SetOption
from launch.program_end import PutOffEnd
from launch.serving.http_socket import check_certificate, listen, take_api_keys, url_of
from launch.serving.tracing import check_tracing
from launch.torchrun_options import with_torchrun_options
from tprt.config import Config
from tprt.log import configure_logging, tell
from tprt.server.routed_client import RoutedClient
from tprt.server.sampling_defaults import read_sampling_defaults


@with_torchrun_options
def serve(
    config: ConfigArgument,
    host: Annotated[str | None, typer.Option(help="Address to bind; see server.host.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port; 0 takes a free one; see server.port.")] = None,
    set_: SetOption = None,
) -> None:
    """Serve a model over HTTP, with the API of OpenAI.

    The first SIGTERM or Ctrl-C lets running requests finish, for server.drain_timeout_s at most, and then ends
    with exit code 0; a second one ends at once.
    """
    given = {"server.host": host, "server.port": port}
    overrides = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    _serve(load_config(config, [*(set_ or ()), *overrides]))


def _serve(config: Config) -> None:
    configure_logging(config.logging.level, config.logging.format, "launcher")
    api_keys = take_api_keys(config.server)
    check_certificate(config.server)
    check_tracing(config.server)
    if changes := read_sampling_defaults(config.model).changes():
        tell(f"requests that do not say otherwise have {changes} (the checkpoint's generation_config.json)")
    with closing(listen(config.server, bool(api_keys))) as listener, Deployment(config) as deployment:
        tell(f"listening on {url_of(listener, config.server)}; requests are served once the ranks are ready")
        deployment.start(listener, api_keys)
        client = deployment.connect(None)
        try:
            deployment.wait_until_ready(client)
            deployment.wait_for_server(client)
            tell(f"ready: serving {config.model.path} on {url_of(listener, config.server)}")
            _serve_until_signal(deployment, client)
        except BaseException:
            client.close(flush=False)
            deployment.kill()
            raise
        deployment.expect_end()
        client.shut_down("the server has drained")
        client.close()


def _serve_until_signal(deployment: Deployment, client: RoutedClient) -> None:
    """Watch the deployment until the first signal, and then until the server has drained.

    Raises:
        EngineDeadError: a process has failed.
        KeyboardInterrupt, SystemExit: a second signal has come.
    """
    with PutOffEnd() as end:
        while not end.is_asked:
            deployment.poll(client)
        deployment.explain_signal()
        timeout_s = deployment.config.server.drain_timeout_s
        tell(f"no new requests; up to {timeout_s:g} s for those that run, a second signal ends them at once")
        deployment.drain_server(client)
