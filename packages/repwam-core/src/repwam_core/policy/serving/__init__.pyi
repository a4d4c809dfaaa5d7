from .client import PolicyClient as PolicyClient
from .client import PolicyServerError as PolicyServerError
from .protocol import ServerMetadata as ServerMetadata
from .server import PolicyServer as PolicyServer
from .server import ServeSettings as ServeSettings
