"""Remote shards, streamed through webdataset. (to come)"""
def is_remote(path: str) -> bool:
    return path.startswith(("http://", "https://", "pipe:", "s3://", "gs://"))
class StreamReader:
    pass
