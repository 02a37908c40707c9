//! Reusable numbered places whose keys carry a generation: a late message for an earlier tenant of a
//! place is recognised and dropped.

/// A place and the tenancy it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

impl Key {
    /// The key of nothing.
    pub(crate) const NONE: Self = Self {
        index: u32::MAX,
        generation: u32::MAX,
    };

    /// The key as one number.
    pub(crate) fn to_u64(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    /// The key from [`to_u64`](Self::to_u64).
    pub(crate) fn from_u64(value: u64) -> Self {
        Self {
            index: value as u32,
            generation: (value >> 32) as u32,
        }
    }
}

struct Place<T> {
    generation: u32,
    value: Option<T>,
}

/// A growing array of places that are used again.
pub(crate) struct Slab<T> {
    places: Vec<Place<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            places: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slab<T> {
    /// Puts a value into a free place.
    pub(crate) fn insert(&mut self, value: T) -> Key {
        self.insert_with(|_| value)
    }

    /// Puts a value that knows its key into a free place.
    pub(crate) fn insert_with(&mut self, make: impl FnOnce(Key) -> T) -> Key {
        if let Some(index) = self.free.pop() {
            let place = &mut self.places[index as usize];
            let key = Key {
                index,
                generation: place.generation,
            };
            place.value = Some(make(key));
            return key;
        }
        let index = u32::try_from(self.places.len()).expect("fewer than 2^32 places are in use");
        let key = Key {
            index,
            generation: 0,
        };
        self.places.push(Place {
            generation: 0,
            value: Some(make(key)),
        });
        key
    }

    /// The value of this tenancy.
    pub(crate) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let place = self.places.get_mut(key.index as usize)?;
        if place.generation != key.generation {
            return None;
        }
        place.value.as_mut()
    }

    /// Ends a tenancy.
    pub(crate) fn remove(&mut self, key: Key) -> Option<T> {
        let place = self.places.get_mut(key.index as usize)?;
        if place.generation != key.generation {
            return None;
        }
        let value = place.value.take()?;
        place.generation = place.generation.wrapping_add(1);
        self.free.push(key.index);
        Some(value)
    }

    /// Ends every tenancy.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = T> {
        self.free.clear();
        std::mem::take(&mut self.places)
            .into_iter()
            .filter_map(|place| place.value)
    }

    /// Takes a free place with what its last tenant left there, to be filled where it is: a large value that is
    /// put together elsewhere is copied, and the copy waits for the parts.
    pub(crate) fn occupy(&mut self) -> (Key, &mut T)
    where
        T: Default,
    {
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place {
                generation: 0,
                value: None,
            });
            u32::try_from(self.places.len() - 1).expect("fewer than 2^32 places are in use")
        });
        let place = &mut self.places[index as usize];
        let key = Key {
            index,
            generation: place.generation,
        };
        (key, place.value.get_or_insert_with(T::default))
    }

    /// Ends a tenancy and leaves the value for the next one.
    pub(crate) fn vacate(&mut self, key: Key) {
        if let Some(place) = self.places.get_mut(key.index as usize)
            && place.generation == key.generation
        {
            place.generation = place.generation.wrapping_add(1);
            self.free.push(key.index);
        }
    }

    /// The number of places in use.
    pub(crate) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_key_does_not_reach_the_next_tenant() {
        let mut slab = Slab::default();
        let first = slab.insert(1);
        assert_eq!(slab.remove(first), Some(1));
        let second = slab.insert(2);
        assert_eq!(second.index, first.index);
        assert_eq!(slab.get_mut(first), None);
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.get_mut(second), Some(&mut 2));
        assert_eq!(Key::from_u64(second.to_u64()), second);
        slab.vacate(first);
        assert_eq!(slab.len(), 1);
        slab.vacate(second);
        assert_eq!(slab.len(), 0);
        assert_eq!(slab.get_mut(second), None);
        let (third, value) = slab.occupy();
        assert_eq!((third.index, *value), (second.index, 2), "what was left");
        assert_eq!(*slab.occupy().1, 0);
        assert_eq!((slab.len(), slab.get_mut(third)), (2, Some(&mut 2)));
    }
}
