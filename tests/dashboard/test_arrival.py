"""How a browser arrives at the running service, and what programs go on getting."""

import http.client

from tests.control.conftest import Service


def _get(service: Service, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response


def test_a_browser_is_led_to_the_dashboard(service: Service) -> None:
    response = _get(service, "/", Accept="text/html,application/xhtml+xml")
    assert (response.status, response.headers["Location"]) == (303, "/dashboard")
    response = _get(service, "/dashboard", Accept="text/html")
    assert (response.status, response.headers["Location"]) == (303, "/login")
    assert _get(service, "/login", Accept="text/html").status == 200


def test_a_program_still_gets_json(service: Service) -> None:
    for headers in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
        response = _get(service, "/", **headers)
        assert (response.status, response.headers["Content-Type"]) == (200, "application/json")


def test_static_files_come_through_the_gateway(service: Service) -> None:
    from control.pages import static_url

    response = _get(service, static_url("app.css"), **{"Accept-Encoding": "gzip"})
    assert response.status == 200
    assert response.headers["Content-Encoding"] == "gzip"
    assert _get(service, "/static/x/%2e%2e/login.html").status == 404
