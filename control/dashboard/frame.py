"""What all pages of one instance have in common: its heading, its state, the tabs."""

from typing import Any

from starlette.responses import Response

from control import instances
from control.database import Record
from control.http import ApiError
from control.pages import PageRequest, render


async def find_instance(request: PageRequest) -> Record:
    """The instance that the path names, also a deleted one. Raises NotFound."""
    return await instances.find(
        request.context.database, request.organization_id, request.path["instance_id"], deleted=None
    )


async def show(
    request: PageRequest,
    tab: str,
    template: str,
    *,
    row: Record | None = None,
    error: ApiError | None = None,
    status: int = 200,
    **values: Any,
) -> Response:
    """A page of an instance; its template extends instances/base.html. `tab` is one of those that stand there."""
    if row is None:
        row = await find_instance(request)
    instance = instances.view(row, request.context.gateway_settings)
    return await render(request, template, error=error, status=status, tab=tab, instance=instance, **values)


def home_of(request: PageRequest) -> str:
    """The address of the instance's first page."""
    return f"/dashboard/{request.organization_id}/instances/{request.path['instance_id']}"
