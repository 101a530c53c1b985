"""Django: `uvicorn examples.django_app:app`, then `curl -X POST localhost:8000/v1/images`.

Images are metered by their route; a video is charged by its view, a plain one, by the second.
Django runs a view for every method, metered or not, hence `require_POST`. It has no lifespan: the
limiter opens at the first request.
"""

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.http import require_POST

from tieredlimit import Account, Limiter, TieredLimitMiddleware
from tieredlimit.identity import api_key
from tieredlimit.integrations.django import limited

POLICY = {
    "order": ["pro", "everyone"],
    "features": {"image": {"routes": ["POST /v1/images"]}, "video": {}},
    "tiers": {
        "pro": {"when": {"plan": "pro"}, "quotas": {"image": "unlimited", "video": "60/hour"}},
        "everyone": {"quotas": {"image": "5/minute", "video": 0}},
    },
}
ACCOUNTS = {"key-ada": Account("ada", plan="pro"), "key-bob": Account("bob", plan="free")}
DENIED = "tieredlimit.integrations.django.DeniedMiddleware"
settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], MIDDLEWARE=[DENIED])


@require_POST
async def create_image(_: HttpRequest) -> JsonResponse:
    """Make an image."""
    return JsonResponse({"image": "ready"})


@require_POST
@limited("video", cost=lambda request: max(1, min(request.resolver_match.kwargs["seconds"], 60)))
def create_video(_: HttpRequest, seconds: int) -> JsonResponse:
    """Make a video."""
    return JsonResponse({"video": f"{seconds} seconds"})


urlpatterns = [path("v1/images", create_image), path("v1/videos/<int:seconds>", create_video)]
application = get_asgi_application()
app = TieredLimitMiddleware(application, limiter=Limiter(POLICY), identify=api_key(ACCOUNTS.get))
