use super::*;

const V3: u32 = 3;

fn standard(word: u64) -> L2Entry {
    L2Entry { word, bitmap: 0 }
}

#[test]
fn compressed_entries_round_trip_at_every_cluster_size() {
    for bits in 9..=21 {
        let geometry = Geometry::new(bits, V3);
        for (offset, bytes) in [(0x5000, 1), (0x5001, 511), (0x51ff, 2), (0x5100, 300)] {
            let raw = Compressed::entry(offset, bytes, &geometry).unwrap();
            let Entry::Compressed(found) = decode(standard(raw), 0, &geometry).unwrap() else {
                panic!("a compressed entry");
            };
            assert_eq!(found.offset, offset);
            assert!(found.len >= bytes, "{bits}: {} of {bytes}", found.len);
            assert_eq!((found.offset + found.len) % 512, 0);
        }
    }
}

#[test]
fn entries_are_told_apart() {
    let v3 = Geometry::new(16, 3);
    let v2 = Geometry::new(16, 2);
    let read = |raw| decode(standard(raw), 0, &v3).unwrap();
    assert_eq!(read(0), Entry::Unallocated);
    assert_eq!(
        read(COPIED | 0x50000),
        Entry::Data {
            host: 0x50000,
            copied: true
        }
    );
    assert_eq!(
        read(ZERO),
        Entry::Zero {
            host: None,
            copied: false
        }
    );
    assert_eq!(
        read(0x50000 | ZERO),
        Entry::Zero {
            host: Some(0x50000),
            copied: false
        }
    );
    assert!(decode(standard(0x50200), 0, &v3).is_err());
    assert!(decode(standard(0x50000 | ZERO), 0, &v2).is_err());
    assert!(decode(standard(COPIED), 0, &v3).is_err());
}

#[test]
fn extended_entries_are_told_apart() {
    let geometry = Geometry::with(16, 3, true, false);
    let read = |word, bitmap| decode(L2Entry { word, bitmap }, 0, &geometry);
    assert_eq!(read(0, 0).unwrap(), Entry::Unallocated);
    let host = 0x50000;
    let whole = read(COPIED | host, 0xffff_ffff).unwrap();
    assert_eq!(whole, Entry::Data { host, copied: true });
    let zero = read(0, 0xffff_ffff << 32).unwrap();
    assert_eq!(
        zero,
        Entry::Zero {
            host: None,
            copied: false
        }
    );
    let mixed = read(COPIED | host, 0b110 | 0b1000 << 32).unwrap();
    let unit = geometry.unit();
    let piece = |start: u64| {
        let part = GuestRange::new(start, geometry.cluster_size() - start);
        mixed.piece(part, &geometry)
    };
    assert_eq!(piece(1), (Piece::Unallocated(Some(host + 1)), unit - 1));
    assert_eq!(piece(unit), (Piece::Data(host + unit), 2 * unit));
    assert_eq!(
        piece(3 * unit + 5),
        (Piece::Zero(Some(host + 3 * unit + 5)), unit - 5)
    );
    assert_eq!(
        piece(4 * unit),
        (Piece::Unallocated(Some(host + 4 * unit)), 28 * unit)
    );
    assert!(read(COPIED | host, 1 | 1 << 32).is_err());
    assert!(read(0, 1).is_err());
    assert!(read(COPIED, 0).is_err());
}

#[test]
fn offset_0_of_a_data_file_is_a_place() {
    let geometry = Geometry::with(16, 3, false, true);
    let read = |word| decode(standard(word), 0, &geometry);
    assert_eq!(read(0).unwrap(), Entry::Unallocated);
    let first = Entry::Data {
        host: 0,
        copied: true,
    };
    assert_eq!(read(COPIED).unwrap(), first);
    assert!(read(COMPRESSED | 0x5000).is_err());
}

#[test]
fn ranges_of_units() {
    assert_eq!(Units::range(0, 32), Units(u32::MAX));
    assert_eq!(Units::range(0, 0), Units::NONE);
    assert_eq!(Units::range(3, 5), Units(0b11000));
    assert_eq!(Units::range(31, 32), Units(1 << 31));
    assert_eq!((Units(0b11000).first(), Units(0b11000).end()), (3, 5));
}
