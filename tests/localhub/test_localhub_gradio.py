"""Gradio's login button, in Space mode, against the local Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.localhub.server import RunningHub

pytestmark = pytest.mark.slow


def test_gradio_logs_a_person_in_through_the_local_hub(local_hub: RunningHub, tmp_path: Path) -> None:
    found = local_hub.client(
        """
        import os
        os.environ.update(SYSTEM="spaces", SPACE_ID="mergebot/space", OAUTH_CLIENT_ID="space",
                          OAUTH_CLIENT_SECRET="a secret of the test", OAUTH_SCOPES="openid profile",
                          OPENID_PROVIDER_URL=os.environ["HF_ENDPOINT"], GRADIO_ANALYTICS_ENABLED="False")
        import gradio, httpx
        from fastapi import FastAPI
        from starlette.testclient import TestClient

        def who(profile: gradio.OAuthProfile | None) -> str:
            return "nobody" if profile is None else f"{profile.username} {profile['iss']}"

        with gradio.Blocks() as demo:
            gradio.LoginButton()
            gradio.Button().click(who, None, gradio.Textbox(), api_name="who")
        app = gradio.mount_gradio_app(FastAPI(), demo, path="/app")
        httpx.post(os.environ["HF_ENDPOINT"] + "/_local/login/alice").raise_for_status()

        # The session cookie is marked Secure; over http on this machine it has to be carried by hand.
        with TestClient(app, base_url="http://127.0.0.1:7860", follow_redirects=False) as space:
            start = space.get("/app/login/huggingface")
            cookies = {c.name: c.value for c in start.cookies.jar}
            at_hub = httpx.get(start.headers["location"])
            back = at_hub.headers["location"].removeprefix("http://127.0.0.1:7860")
            done = space.get(back, headers={"Cookie": "; ".join(f"{k}={v}" for k, v in cookies.items())})
            cookies |= {c.name: c.value for c in done.cookies.jar}
            carried = {"Cookie": "; ".join(f"{k}={v}" for k, v in cookies.items())}

            def ask(headers):
                event = space.post("/app/gradio_api/call/who", json={"data": []}, headers=headers).json()["event_id"]
                return space.get(f"/app/gradio_api/call/who/{event}", headers=headers).text

            space.cookies.clear()
            result = dict(status=done.status_code, told=ask(carried), stranger=ask({}))
        """,
        tmp_path / "home",
    )
    assert found["status"] in (302, 307)
    assert f"alice {local_hub.url}" in found["told"] and "nobody" in found["stranger"]
    assert local_hub.unknown() == []
