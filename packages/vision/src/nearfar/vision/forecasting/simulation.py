"""A simulated series: rotating shallow water on a doubly periodic plane, for use where no data are at hand."""

import numpy as np
import xarray as xr


def shallow_water(
    times: int = 200,
    size: tuple[int, int] = (32, 64),
    *,
    seed: int = 0,
    spacing: int = 12,
    rotation: float = 6.0,
    wind: float = 0.3,
) -> xr.Dataset:
    """Depth anomaly h and velocities u, v of shallow water, `times` fields `spacing` time steps apart.

    dh/dt = -div((1 + h) U), dU/dt = -U.grad U - grad h + f rot(U), gravity and mean depth 1, f = `rotation`, on a plane
    of height 1 and width W / H, by spectral derivatives (two thirds of the waves), Runge-Kutta of order 4 and a filter
    of the shortest waves, from a random flow in balance. A uniform `wind` to the east carries it all past the grid, as
    seen from a frame that moves west, without which the flow hardly leaves its place. Simulated, not observed:
    latitudes from -30 to 30 degrees and six-hour steps only label the axes.
    """
    height, width = size
    rng = np.random.default_rng(seed)
    ky = 2 * np.pi * np.fft.fftfreq(height, 1 / height)[:, None]
    kx = 2 * np.pi * np.fft.rfftfreq(width, 1 / width)[None] * height / width
    square = kx**2 + ky**2
    top = np.pi * height
    keep = (np.abs(ky) < 2 / 3 * top) & (np.abs(kx) < 2 / 3 * top)
    damping = np.exp(-0.05 * (square / square.max()) ** 2)
    to, back = np.fft.rfft2, lambda z: np.fft.irfft2(z, s=size)
    noise = to(rng.standard_normal(size)) * (square > 0) * np.exp(-0.5 * (np.sqrt(square) / (2 * np.pi * 2.5)) ** 2)
    depth = back(noise)
    depth *= 0.1 / depth.std()
    wave = to(depth)
    state = np.stack((wave, -1j * ky * wave / rotation, 1j * kx * wave / rotation))

    def change(s: np.ndarray) -> np.ndarray:
        h, u, v, hx, ux, vx, hy, uy, vy = back(np.concatenate((s, 1j * kx * s, 1j * ky * s)))
        depth_u, depth_v, du, dv = to(
            np.stack(
                (
                    (1 + h) * u,
                    (1 + h) * v,
                    rotation * v - hx - u * ux - v * uy,
                    -rotation * u - hy - u * vx - v * vy,
                )
            )
        )
        return np.stack((-1j * (kx * depth_u + ky * depth_v), du, dv)) * keep

    dt = 0.4 / height
    fields = np.empty((times, 3, *size), np.float32)
    for i in range(times):
        fields[i] = back(state * np.exp(-1j * kx * wind * dt * spacing * i))
        for _ in range(spacing):
            k1 = change(state)
            k2 = change(state + dt / 2 * k1)
            k3 = change(state + dt / 2 * k2)
            k4 = change(state + dt * k3)
            state = (state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)) * damping
    axes = {
        "time": np.datetime64("2000-01-01T00", "ns") + np.arange(times) * np.timedelta64(6, "h"),
        "latitude": np.linspace(30, -30, height),
        "longitude": np.arange(width) * 360 / width,
    }
    names = {"h": "depth anomaly", "u": "velocity to the east", "v": "velocity to the north"}
    variables = {
        name: (tuple(axes), fields[:, i], {"long_name": title}) for i, (name, title) in enumerate(names.items())
    }
    return xr.Dataset(variables, axes, {"title": "simulated rotating shallow water", "seed": seed})
