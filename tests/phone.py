"A video as phones and screen recorders write it: its rate varies, and the brightness of each picture tells its time."
from bisect import bisect_right
from fractions import Fraction

LEVELS = 60 # of brightness per second


def phone_video(path, frames: int = 60, size=(48, 80)) -> list: # seconds of each frame
    "20 frames at 30 a second, 20 at 10, and so on, whole milliseconds; without loss."
    import av
    import numpy as np
    times = [0]
    for i in range(frames - 1): times.append(times[-1] + (33 if i // 20 % 2 == 0 else 100))
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264rgb", rate=30)
        stream.height, stream.width = size
        stream.pix_fmt, stream.codec_context.time_base, stream.options = "rgb24", Fraction(1, 1000), {"qp": "0"}
        for time in times:
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), round(LEVELS * time / 1000), np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            for packet in stream.encode(frame): out.mux(packet)
        for packet in stream.encode(): out.mux(packet)
    return [time / 1000 for time in times]


def shown(times: list, at: float) -> int: # of `phone_video`; seconds
    "Brightness of what is on screen."
    return round(LEVELS * times[bisect_right(times, at + 1e-6) - 1])
