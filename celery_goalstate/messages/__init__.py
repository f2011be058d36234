"""The only room that knows how Celery and kombu publish and read messages."""
