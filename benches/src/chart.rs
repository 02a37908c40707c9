//! The table as a picture: how far each row is above or below its bar.

use plotters::{
    coord::Shift,
    prelude::{
        BLACK, Color as _, DrawingArea, IntoDrawingArea as _, IntoFont as _, PathElement, RGBColor,
        Rectangle, SVGBackend, Text, WHITE,
    },
};

use crate::{Result, table::Entry};

/// Height of a row, and of what is above the first, in pixels.
const ROW: i32 = 18;
const TOP: i32 = 64;
/// Where the bars start and end; names are to the left, numbers to the right.
const LEFT: i32 = 430;
const RIGHT: i32 = 1010;
const WIDTH: u32 = 1200;

/// The range that is drawn, on a logarithmic scale: 1 is a row that just meets its bar.
const LEAST: f64 = 0.25;
const MOST: f64 = 16.0;

const MET: RGBColor = RGBColor(46, 139, 87);
const HOST_BOUND: RGBColor = RGBColor(70, 130, 180);
const MISSED: RGBColor = RGBColor(205, 92, 92);
const OTHER: RGBColor = RGBColor(160, 160, 160);

/// Where a score is drawn.
fn place(score: f64) -> i32 {
    let part = (score.clamp(LEAST, MOST) / LEAST).ln() / (MOST / LEAST).ln();
    LEFT + (part * f64::from(RIGHT - LEFT)).round() as i32
}

/// The picture, as SVG.
///
/// # Errors
/// When there are too many rows.
pub fn draw(entries: &[Entry], about: &str) -> Result<String> {
    let mut svg = String::new();
    let height = TOP + ROW * i32::try_from(entries.len())? + ROW;
    {
        let size = (WIDTH, height.unsigned_abs());
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        area.fill(&WHITE)?;
        text(
            &area,
            "Platter beside its peers: times its bar",
            (10, 8),
            18,
        )?;
        text(&area, about, (10, 30), 11)?;
        for score in [0.5, 1.0, 2.0, 4.0, 8.0] {
            let x = place(score);
            let style = if score == 1.0 { BLACK } else { OTHER };
            area.draw(&PathElement::new(
                vec![(x, TOP - 4), (x, height - ROW)],
                style.stroke_width(1),
            ))?;
            text(&area, &format!("{score}"), (x - 4, TOP - 18), 11)?;
        }
        for (row, entry) in (0..).zip(entries) {
            let y = TOP + row * ROW;
            text(&area, &entry.name, (10, y), 12)?;
            bar(&area, entry, y)?;
        }
        area.present()?;
    }
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn text(area: &Area<'_>, text: &str, at: (i32, i32), size: i32) -> Result<()> {
    let font = ("sans-serif", size).into_font();
    Ok(area.draw(&Text::new(text.to_owned(), at, font))?)
}

fn bar(area: &Area<'_>, entry: &Entry, y: i32) -> Result<()> {
    let verdict = entry.verdict();
    let color = match verdict {
        "met" => MET,
        "host-bound" => HOST_BOUND,
        missed if missed.starts_with("missed") => MISSED,
        _ => OTHER,
    };
    let label = match entry.score() {
        Some(score) => {
            let corners = [(place(1.0), y + 1), (place(score), y + ROW - 5)];
            area.draw(&Rectangle::new(corners, color.filled()))?;
            if score.is_finite() {
                format!("{score:.2} {verdict}")
            } else {
                verdict.to_owned()
            }
        }
        None => verdict.to_owned(),
    };
    text(area, &label, (RIGHT + 20, y), 12)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{Bar, Measure};

    #[test]
    fn every_row_is_in_the_picture() {
        let row = |name, ours| {
            let measure = Measure::note("x", ours, Some(2.0)).bar(Bar::RatioAtMost(1.0));
            Entry::new(name, ("a", "b"), 15, vec![measure])
        };
        let rows = [
            row("the good one", 1.0),
            row("the bad one", 4.0),
            row("the one that is nothing", 0.0),
            Entry::failure("the one that failed", "it crashed"),
        ];
        let svg = draw(&rows, "about this").unwrap();
        for text in [
            "about this",
            "the good one",
            "2.00 met",
            "the bad one",
            "0.50 missed",
            "the one that is nothing",
            "the one that failed",
            "failed",
        ] {
            assert!(svg.contains(text), "{text}: {svg}");
        }
        assert!(svg.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn scores_are_drawn_on_a_logarithmic_scale() {
        assert_eq!(place(0.0), LEFT);
        assert_eq!(place(f64::INFINITY), RIGHT);
        let (low, high) = (place(4.0) - place(1.0), place(16.0) - place(4.0));
        assert!(low > 0 && (low - high).abs() <= 1);
    }
}
