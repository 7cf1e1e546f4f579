"""The routes about the service itself: health, readiness, status, and the page."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

from ceca.config import ServeConfig
from serve.refusals import Overloaded, documented
from serve.schema import Health, Ready, Status
from serve.service import Service

PAGE = Path(__file__).parents[1] / "page"
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data: blob:; connect-src 'self'; "
    "style-src 'self' 'unsafe-inline'; script-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def about_routes(service: Service, config: ServeConfig, closed: bool) -> APIRouter:
    about = APIRouter(tags=["service"])

    @about.get("/healthz")
    async def healthz() -> Health:
        """The process answers."""
        return Health()

    @about.get("/readyz")
    async def readyz() -> Ready:
        """Every replica has loaded what is served."""
        if not service.ready:
            raise Overloaded("the replicas load the gallery")
        edition = service.snapshot.edition
        images = len(service.snapshot.catalogue)
        calibration = service.snapshot.calibration_for(config)
        omega = calibration.omega if calibration else None
        return Ready(
            model=edition.model_name,
            gallery=edition.gallery_name,
            images=images,
            calibrated_omega=omega,
            rerank_seconds=config.rerank_seconds_limit if config.rerank_engine else None,
        )

    @about.get("/v1/status", responses=documented(401, 429))
    async def status() -> Status:
        """What is served, what waits, and what went wrong."""
        return await service.status()

    _add_page(about, config, closed)
    return about


def _add_page(about: APIRouter, config: ServeConfig, closed: bool) -> None:
    """Add the routes of the page's files, with the configured limits and the need for a key in its HTML."""
    files = {name: (PAGE / name).read_text(encoding="utf-8") for name in ("index.html", "page.js", "page.css")}
    for name in ("omega", "top_k_limit", "text_limit", "image_bytes_limit"):
        files["index.html"] = files["index.html"].replace("{{" + name + "}}", str(getattr(config, name)))
    files["index.html"] = files["index.html"].replace("{{closed}}", "true" if closed else "false")

    @about.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(files["index.html"], headers=PAGE_HEADERS)

    @about.get("/page.js", include_in_schema=False)
    async def script() -> Response:
        return Response(files["page.js"], media_type="text/javascript", headers=PAGE_HEADERS)

    @about.get("/page.css", include_in_schema=False)
    async def style() -> Response:
        return Response(files["page.css"], media_type="text/css", headers=PAGE_HEADERS)
