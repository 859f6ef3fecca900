"The camera server alone, in the foreground."
from pathlib import Path

from camflow.servers.app import make_server
from camflow.servers.service import ServerConfig

if __name__ == "__main__": make_server(ServerConfig("camflow.rewards.camera:CameraReward", port=18700, roots=[str(Path.cwd())])).run()
