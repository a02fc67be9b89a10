"""Planes of volumes as pictures: turned as radiologists see them, and many of them in one montage."""
import numpy as np


def radiological(plane):
    """(rows, columns) picture of a plane whose axes grow to the right and up: the patient's right is on the left.

    plane: (a, b) with a towards the patient's right (a coronal or axial plane), b towards anterior or superior.
    """
    return np.asarray(plane)[::-1, ::-1].T


def montage(rows, labels=None, tile=96, gap=2):
    """uint8 (height, width) picture: rows of grey tiles in [0, 1], each row under its label.

    The largest tile is magnified to at least `tile` pixels, all by the same whole factor.
    """
    from PIL import Image, ImageDraw
    zoom = max(1, round(tile / max(max(image.shape) for row in rows for image in row)))
    strip = 14 if labels else 0  # height of a label
    width = max(sum(image.shape[1] * zoom + gap for image in row) for row in rows)
    heights = [max(image.shape[0] for image in row) * zoom + gap + strip for row in rows]
    canvas = Image.new("L", (width, sum(heights)), 40)
    draw, top = ImageDraw.Draw(canvas), 0
    for row, label, height in zip(rows, labels or [""] * len(rows), heights):
        draw.text((4, top + 1), label, fill=255)
        left = 0
        for image in row:
            pixels = (np.clip(image, 0, 1) * 255).astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)
            canvas.paste(Image.fromarray(pixels), (left, top + strip))
            left += pixels.shape[1] + gap
        top += height
    return np.asarray(canvas)


def planes(view):
    """[axial, coronal] middle planes of a view (X, Y, Z), as pictures with anterior or superior on top."""
    view = view.float().cpu().numpy()
    x, y, z = view.shape
    return [radiological(view[:, :, z // 2]), radiological(view[:, y // 2])]


def view_rows(views, batch, most):
    """Rows of tiles and their labels for `montage`. views: [global (2 B, 1, ...), local (L B, 1, ...)]."""
    rows, labels = [], []
    for sample in range(min(batch, most)):
        row = [tile for view in views[0][sample::batch] for tile in planes(view[0])]
        row += [planes(view[0])[0] for local in views[1:] for view in local[sample::batch]]
        rows.append(row)
        labels.append(f"sample {sample}: two global views (axial, coronal), then local ones (axial); patient's right on "
                      "the left")
    return rows, labels
